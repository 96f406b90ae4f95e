from vqd_scale.commands.reduce_codebook import main

if __name__ == "__main__":
    main()
