"""Training of the nano checkpoint: drawn pictures, questions about them, and the training itself."""
