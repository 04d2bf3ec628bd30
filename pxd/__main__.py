from pxd.cli.main import main

main()
