"""What type checkers have to accept of a user's script, under each family; ``make lint`` looks at it."""

import lightning as L
import lightning_fabric as lf
import pytorch_lightning as pl

import lightning_adpsgd
import lightning_adpsgd.fabric
import lightning_adpsgd.lightning_fabric
import lightning_adpsgd.pytorch_lightning

L.Trainer(strategy=lightning_adpsgd.ADPSGDStrategy(4), callbacks=[lightning_adpsgd.CommunicationMonitor()])
pl.Trainer(
    strategy=lightning_adpsgd.pytorch_lightning.ADPSGDStrategy.int4(overlap=1),
    callbacks=[lightning_adpsgd.pytorch_lightning.CommunicationMonitor(plot=True, progress_bar=True)],
)
lightning_adpsgd.CommunicationMonitor(progress_bar=True).plot().savefig("run.png")
lightning_adpsgd.fabric.CommunicationMonitor().plot().savefig("run.png")
L.Fabric(strategy=lightning_adpsgd.fabric.ADPSGDStrategy(4, total_steps=100))
lf.Fabric(strategy=lightning_adpsgd.lightning_fabric.ADPSGDStrategy(4)).launch()
