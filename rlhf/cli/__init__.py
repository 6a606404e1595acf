"""The command line. Nothing heavy is imported before a recipe is valid."""
