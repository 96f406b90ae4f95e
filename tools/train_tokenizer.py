from vqd_scale.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
