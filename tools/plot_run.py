from vqd_scale.commands.plot_run import main

if __name__ == "__main__":
    main()
