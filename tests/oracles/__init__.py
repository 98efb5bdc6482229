"""Second opinions for tests: slow, dense, and written without any of bayesgn's own algebra."""
