from spatialvae.cli import main

main()
