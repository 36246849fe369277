"""Where tokens went (`analyse`), what each expert is worth, and which look odd (`audit`)."""
