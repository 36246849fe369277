"""The report of an analysis: one page, its numbers and figures (`phatgoose analyse`)."""
