// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Cost, Price} from "../src/Price.sol";
import {Tariff, WorkReceipt} from "../src/Types.sol";

/// @notice Exposes the price formula to the vector test (tests/contracts/test_price.py); deployed nowhere else.
contract PriceHarness {
    function costUp(Tariff calldata tariff, WorkReceipt calldata receipt) external pure returns (bool, Cost memory) {
        return Price.costUp(tariff, receipt);
    }

    function holds(Tariff calldata tariff, WorkReceipt calldata receipt) external pure returns (bool) {
        return Price.holds(tariff, receipt);
    }
}
