"""Where mathematics, models, machines and memory meet: one loop, and how each stage feeds it."""
