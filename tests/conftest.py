"""Its place puts tests/ on the path, for what several suites share (`import pki`)."""
