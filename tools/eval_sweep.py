from vqd_scale.commands.eval_sweep import main

if __name__ == "__main__":
    main()
