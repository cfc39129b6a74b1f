"""A rival: two-way KL, where an EO and a SAR network train at once and each is the other's teacher.

python benchmarks/mutual.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png of the SAR network

benchmarks/ablation.py runs it. Batches, first weights and number of steps are those of sar_feature.py, so that only
the method differs: the EO network is not frozen, and KL goes both ways. The gradients of both networks are clipped by
one norm, and pairs without labels are left aside. The first of the 2026 challenge names two-way KL, draws by entity and
MixStyle as the parts of its method; all three are settings here.

Sources: Zhang et al., "Deep Mutual Learning", CVPR 2018, equations 2 to 4; Zhou et al., "Domain Generalization with
MixStyle", ICLR 2021, equations 3 to 6.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sar_feature
from data.augment import Augmentation
from data.batches import Batches
from data.entities import find_entities
from data.layouts import find_pairs
from data.sampler import WeightedStream
from data.split import choose_training
from data.store import MemoryBudget, choose_reading, grey_statistics, open_store, place_stores
from models.distillation import distillation_loss
from models.focal import focal_loss
from utils.predict.tta import all_views, scaled
from utils.run.checkpoint import build_model, load_checkpoint
from utils.run.device import choose_device
from utils.run.identity import made_from
from utils.run.resume import Run
from utils.run.settings import read_settings
from utils.run.start import run as run_script
from utils.train.learner import Learner, Optimization
from utils.train.loop import fit
from utils.train.validation import Validation, labelled_chips, unseen_pairs

import torch

TEACHER = "runs/pretrain/best.pt"  # EO checkpoint that both networks start from
OUT_DIR = "runs/mutual"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept
EPOCHS = sar_feature.EPOCHS
BATCH_SIZE = sar_feature.BATCH_SIZE
LEARNING_RATE = sar_feature.LEARNING_RATE
WEIGHT_DECAY = sar_feature.WEIGHT_DECAY
WARMUP_EPOCHS = sar_feature.WARMUP_EPOCHS
CLIP = sar_feature.CLIP
TEMPERATURE = sar_feature.TEMPERATURE
GAMMA = sar_feature.GAMMA
BALANCE = sar_feature.BALANCE
JITTER = sar_feature.JITTER
SPECKLE = sar_feature.SPECKLE
TRAIN_SCALES = sar_feature.TRAIN_SCALES
BALANCE_ENTITIES = 0.0  # 1 = draws by entity
MIXSTYLE = 0.0  # share of the steps in which the statistics of the SAR network's feature maps are mixed
SEED = 0
RESUME = True
SAVE_EVERY_MIN = 10.0
MAX_BAD_STEPS = 20
TENSORBOARD = False

stages = ("layer1", "layer2")  # of a ResNet; their outputs are mixed


def main():
    settings = read_settings(globals())
    device, run = choose_device("auto"), Run("sar_feature", settings)
    torch.manual_seed(SEED)
    source = load_checkpoint(TEACHER, "pretrain.py", sensor="EO", stages=("pretrain",))
    pairs, size = find_pairs(source["data_root"], source["classes"], source["class_ids"]), source["image_size"]
    eo_network, sar_network = (build_model(source, TEACHER).to(device) for _ in range(2))
    if MIXSTYLE:
        for stage in stages:
            getattr(sar_network.backbone, stage).register_forward_hook(mix_styles)

    side, grey_range = reading = choose_reading(pairs.sar)
    eo_chips = open_store(pairs.eo, STORE_DIR, False, source["chip_side"], source["grey_range"])
    sar_chips = open_store(pairs.sar, STORE_DIR, False, *reading)
    budget = MemoryBudget(device)
    eo, sar = place_stores(budget, eo_chips, sar_chips)
    labelled = labelled_chips(source["data_root"], pairs, reading, budget, STORE_DIR, False)
    entities = find_entities(pairs, STORE_DIR, reading=source["eo_reading"])
    train = choose_training(pairs, entities, 0.0 if labelled else source["val_fraction"])
    eo_train, by_entity = eo.subset(train.indices), (train.entities, BALANCE_ENTITIES)
    stream = WeightedStream(train.labels, run.batch_size, BALANCE, SEED, *by_entity)
    batches = Batches(stream, train.labels, device, EPOCHS, sar.subset(train.indices))
    sar_grey, sizes = grey_statistics(sar_chips, train.indices), [scaled(size, scale) for scale in TRAIN_SCALES]
    augment_sar = Augmentation(sar_grey, JITTER, SPECKLE, 0.0, sizes)
    augment_eo = Augmentation(source["grey"], JITTER, 0.0, 0.0, sizes)

    def loss_of(batch):
        logits = sar_network(augment_sar(batch))
        eo_logits = eo_network(augment_eo(replace(batch, chips=eo_train[batch.indices])))
        # Each network learns from the labels and from the other one, which is detached.
        of_labels = sum(focal_loss(x, batch.labels, GAMMA) for x in (logits, eo_logits))
        of_each_other = distillation_loss(logits, eo_logits, TEMPERATURE)
        of_each_other += distillation_loss(eo_logits, logits, TEMPERATURE)
        return of_labels + of_each_other, logits, batch.labels

    contents = source | {
        "sensor": "SAR", "chip_side": side, "grey_range": grey_range, "grey": sar_grey, "scales": TRAIN_SCALES,
        "counts": pairs.counts, "views": all_views(TRAIN_SCALES),
        "held_out": unseen_pairs(pairs, train, source, TEACHER),
    }  # fmt: skip
    optimization = Optimization(LEARNING_RATE, WEIGHT_DECAY, WARMUP_EPOCHS, CLIP, seed=SEED)
    held_out = sar.subset(train.held_out), pairs.labels[train.held_out]
    validate = Validation(*(labelled or held_out), size, sar_grey)
    if run.begin(made_from(__file__, pairs, [eo_chips, sar_chips], entities, labelled, source=source)):
        fit(Learner(sar_network, loss_of, batches, optimization, [eo_network]), batches, validate, run, contents)


def mix_styles(module, inputs, maps):
    """A forward hook: feature maps [N, C, H, W] with mean and deviation of each channel mixed with another chip's.

    In training, in a share MIXSTYLE of the steps. The chip's own share in the mixture is drawn from Beta(0.1, 0.1).
    """
    if not module.training or torch.rand(()) >= MIXSTYLE:
        return maps
    deviation, mean = torch.std_mean(maps.detach(), dim=(2, 3), keepdim=True)
    deviation = deviation + 1e-6
    own = torch.distributions.Beta(0.1, 0.1).sample((len(maps), 1, 1, 1)).to(maps)
    other = torch.randperm(len(maps), device=maps.device)
    mixed_mean, mixed_deviation = (own * x + (1 - own) * x[other] for x in (mean, deviation))
    return (maps - mean) / deviation * mixed_deviation + mixed_mean


if __name__ == "__main__":
    run_script(main)
