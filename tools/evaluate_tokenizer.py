from vqd_scale.commands.evaluate_tokenizer import main

if __name__ == "__main__":
    main()
