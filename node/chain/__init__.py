"""The chain behind the Chain port. Importing this package does not import web3; `Web3Chain.start` does."""

from node.chain.chain import ChainOptions, Web3Chain
from node.chain.deployment import Deployment
from node.chain.rpc import RpcLimits

__all__ = ["ChainOptions", "Deployment", "RpcLimits", "Web3Chain"]
