from vqd_scale.commands.cost import main

if __name__ == "__main__":
    main()
