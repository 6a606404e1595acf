"""Language models and scorers: built, called, sampled from and published as Hugging Face folders."""
