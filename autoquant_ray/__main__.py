"""``python -m autoquant_ray`` is the command line."""

from autoquant_ray.cli.main import main

if __name__ == "__main__":
    main(prog_name="autoquant-ray")
