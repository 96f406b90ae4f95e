from vqd_scale.commands.make_shards import main

if __name__ == "__main__":
    main()
