"""Training, evaluation and roll-outs. Modules are imported by name, since some need Lightning."""
