"""Methods side by side on whole suites, as in the paper's Table 1."""
