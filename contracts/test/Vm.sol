// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice The part of forge's cheat codes that these tests use (https://getfoundry.sh/reference/cheatcodes).
interface Vm {
    struct Log {
        bytes32[] topics;
        bytes data;
        address emitter;
    }

    struct ChainInfo {
        uint256 forkId;
        uint256 chainId;
    }

    struct StorageAccess {
        address account;
        bytes32 slot;
        bool isWrite;
        bytes32 previousValue;
        bytes32 newValue;
        bool reverted;
    }

    struct AccountAccess {
        ChainInfo chainInfo;
        uint8 kind;
        address account;
        address accessor;
        bool initialized;
        uint256 oldBalance;
        uint256 newBalance;
        bytes deployedCode;
        uint256 value;
        bytes data;
        bool reverted;
        StorageAccess[] storageAccesses;
        uint64 depth;
        uint64 oldNonce;
        uint64 newNonce;
    }

    function addr(uint256 secret) external pure returns (address);
    function sign(uint256 secret, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function prank(address sender) external;
    function warp(uint256 timestamp) external;
    function roll(uint256 blockNumber) external;
    function snapshotState() external returns (uint256);
    function revertToState(uint256 id) external returns (bool);
    function chainId(uint256 id) external;
    function getNonce(address account) external view returns (uint64);
    function computeCreateAddress(address deployer, uint256 nonce) external pure returns (address);
    function etch(address target, bytes calldata code) external;
    function expectRevert(bytes calldata revertData) external;
    function expectEmit() external;
    function recordLogs() external;
    function getRecordedLogs() external returns (Log[] memory);
    function startStateDiffRecording() external;
    function stopAndReturnStateDiff() external returns (AccountAccess[] memory);
}

Vm constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

/// @notice A check failed; both values are the evidence.
error Unequal(string what, uint256 got, uint256 expected);

/// @notice Assertions, bounds and signing shared by the tests.
abstract contract Checks {
    /// @dev Names forge's invariant runner calls to learn what it may call.
    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    function eq(uint256 got, uint256 expected, string memory what) internal pure {
        if (got != expected) revert Unequal(what, got, expected);
    }

    function eq(address got, address expected, string memory what) internal pure {
        eq(uint160(got), uint160(expected), what);
    }

    function eq(bytes32 got, bytes32 expected, string memory what) internal pure {
        eq(uint256(got), uint256(expected), what);
    }

    function isTrue(bool holds, string memory what) internal pure {
        eq(holds ? 1 : 0, 1, what);
    }

    /// @dev `x` folded into [least, most].
    function bound(uint256 x, uint256 least, uint256 most) internal pure returns (uint256) {
        uint256 size = most - least;
        return size == type(uint256).max ? x : least + x % (size + 1);
    }

    /// @dev 65 bytes r || s || v.
    function signature(uint256 secret, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(secret, digest);
        return abi.encodePacked(r, s, v);
    }

    /// @dev One packed item of Escrow.settle.
    function packedVoucher(uint256 secret, bytes32 digest, uint96 cumulative) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(secret, digest);
        return abi.encodePacked(r, bytes32(uint256(s) | uint256(v - 27) << 255), cumulative);
    }
}
