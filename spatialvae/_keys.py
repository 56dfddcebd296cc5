"""Every name that this package writes into or reads from an AnnData, once."""

SETUP = "_spatialvae"  # uns: what setup_anndata was told
LATENT = "X_spatialvae"  # obsm: niche dimensions, then cell dimensions
LATENT_NAMES = "X_spatialvae_names"  # uns: one name per column of LATENT
DOMAIN = "spatial_domain"  # obs
DOMAIN_PROBABILITY = "spatial_domain_probability"  # obsm
DOMAIN_NUMBER = "spatial_domain_number"  # uns: how stable each number of domains is, if none was given
IS_BLANK = "is_blank"  # var: words of the codebook without a gene; never modelled
EFFICIENCY = "detection_efficiency"  # var: share of the molecules of a gene that is called
WRONG = "misidentification_rate"  # var: share of the calls of a gene that are wrong
WRITTEN = {"obsm": (LATENT, DOMAIN_PROBABILITY), "uns": (SETUP, LATENT_NAMES, DOMAIN_NUMBER)}  # and DOMAIN, in obs
