"""What the kernel runs as PID 1: `python3 -ISB …/nacre/agent/__main__.pyc`. The order of imports is the point."""

from nacre.agent import prepared

if __name__ == "__main__":
    prepared.install()
    from nacre.agent import main

    prepared.remove()
    main.run()
