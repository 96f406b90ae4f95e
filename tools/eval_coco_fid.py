from vqd_scale.commands.eval_coco_fid import main

if __name__ == "__main__":
    main()
