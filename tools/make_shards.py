from vqd_scale.commands.make_shards import main

main()
