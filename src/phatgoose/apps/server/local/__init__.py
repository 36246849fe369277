"""The backend that computes answers here, with models of this process."""
