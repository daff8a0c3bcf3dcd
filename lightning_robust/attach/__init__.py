"""How we hold on to a module that nobody here wrote, and let go of it."""
