"""What one does with an IHA model: load it, train it, test it, look inside it."""
