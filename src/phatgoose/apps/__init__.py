"""What people run: the command line and the demo. The core never imports these.

cli/           The `phatgoose` command: one subcommand per stage of the story
console/       What a person reads in a terminal
demo/          The demo: train five experts on tasks of our own text, route them, and look
generation.py  Answers from a routed model, with the experts behind each token where wanted
harness.py     Routed models under lm-evaluation-harness: `lm_eval --model phatgoose`
ray/           Many machines: jobs on a Ray cluster. Needs the extra 'ray'
report/        The report page of an analysis (`phatgoose analyse`)
server/        Routed models behind an HTTP interface that speaks OpenAI's protocol (docs/serving.md
"""
