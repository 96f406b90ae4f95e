from vqd_scale.commands.eval_ablation import main

if __name__ == "__main__":
    main()
