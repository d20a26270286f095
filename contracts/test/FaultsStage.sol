// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ICourt} from "../src/ICourt.sol";

/// @notice Registry, Escrow and Court as far as Faults reads them, for the differential test
/// (tests/contracts/test_faults.py); deployed nowhere else.
contract FaultsStage {
    uint32 private immutable _epochSeconds;

    mapping(address nodeKey => address) private _wallets;
    mapping(bytes32 tariffHash => address) private _loggers;
    mapping(bytes32 key => ICourt.Made) private _made;

    constructor(uint32 epochSeconds) {
        _epochSeconds = epochSeconds;
    }

    function bindKey(address nodeKey, address wallet) external {
        _wallets[nodeKey] = wallet;
    }

    function logTariff(bytes32 tariffHash, address provider) external {
        _loggers[tariffHash] = provider;
    }

    function setRoot(bytes32 key, address provider, bytes32 root, uint32 count, uint96 total) external {
        ICourt.Made storage made = _made[key];
        (made.provider, made.root, made.count, made.total) = (provider, root, count, total);
    }

    function walletOf(address nodeKey) external view returns (address, uint40, uint40) {
        return (_wallets[nodeKey], 0, 0);
    }

    function tariffs(bytes32 tariffHash) external view returns (address, uint48, uint48) {
        return (_loggers[tariffHash], 0, 0);
    }

    function ownerOf(address, address signer) external pure returns (address) {
        return signer;
    }

    function commitments(bytes32 key) external view returns (ICourt.Made memory) {
        return _made[key];
    }

    function rules() external view returns (ICourt.Rules memory r) {
        r.epochSeconds = _epochSeconds;
    }

    function profileSince(bytes32) external pure returns (uint40) {
        return 1;
    }
}
