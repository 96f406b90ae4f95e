from vqd_scale.commands.benchmark import main

if __name__ == "__main__":
    main()
