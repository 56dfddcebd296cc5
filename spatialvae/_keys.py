"""The names that this package writes into or reads from an AnnData."""

SETUP = "_spatialvae"  # uns: the arguments of setup_anndata
LATENT = "X_spatialvae"  # obsm: niche dimensions, then cell dimensions
LATENT_NAMES = "X_spatialvae_names"  # uns: one name per column of LATENT
DOMAIN = "spatial_domain"  # obs
DOMAIN_PROBABILITY = "spatial_domain_probability"  # obsm
DOMAIN_NUMBER = "spatial_domain_number"  # uns: stability of each number of domains, if none was given
IS_BLANK = "is_blank"  # var: codewords without a gene; never modelled
EFFICIENCY = "detection_efficiency"  # var: share of the molecules of a gene that are called
WRONG = "misidentification_rate"  # var: share of the calls of a gene that are wrong
WRITTEN = {"obsm": (LATENT, DOMAIN_PROBABILITY), "uns": (SETUP, LATENT_NAMES, DOMAIN_NUMBER)}  # and DOMAIN, in obs
