"""`rlhf doctor`: is this machine, and this installation, fit for a run? Every check is a function, run when asked."""
