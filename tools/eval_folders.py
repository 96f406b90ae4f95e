from _environment import run

if __name__ == "__main__":
    run("vqd_scale.cli.eval_folders")
