from vqd_scale.commands.tokenize_shards import main

if __name__ == "__main__":
    main()
