from experiments.exact_lm.run import cli

cli()
