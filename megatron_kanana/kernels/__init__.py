"""The project's own operations: one module an operation, several backends behind one signature."""
