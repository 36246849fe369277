"""Routers for phatgoose that no published table favours: one class each."""
