from experiments.hh_harmless.run import cli

cli()
