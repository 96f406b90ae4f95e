from vqd_scale.commands.launch import main

if __name__ == "__main__":
    main()
