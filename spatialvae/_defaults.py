"""What the command line and the model agree on, without anything heavy to import."""

LIKELIHOODS = ("zinb", "nb", "poisson")  # of counts; the first is the default
