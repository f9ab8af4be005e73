"""Ask a model a question: `python -m latent_reasoning.ask MODEL_DIR "question"`."""

from latent_reasoning.evaluation.ask import main
from latent_reasoning.runtime.command import run_stage

if __name__ == "__main__":
    run_stage(main)
