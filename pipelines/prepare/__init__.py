"""`d2l prepare`: documents, or questions about them, become a training set."""
