from vqd_scale.commands.inpaint import main

if __name__ == "__main__":
    main()
