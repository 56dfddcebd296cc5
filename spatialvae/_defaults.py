"""Constants that the command line and the model share, in a module that imports nothing."""

LIKELIHOODS = ("zinb", "nb", "poisson")  # the first is the default
