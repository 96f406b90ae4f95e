from vqd_scale.commands.demo import main

if __name__ == "__main__":
    main()
