"""The mathematics: pure functions over tensors that know no model, no machine and no recipe."""
