// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Tariff, WorkReceipt} from "./Types.sol";

/// @notice The lines of a receipt, in wei; `multiplier` has scale 10^16.
struct Cost {
    uint256 promptLine;
    uint256 cachedLine;
    uint256 completionLine;
    uint256 reasoningLine;
    uint256 multiplier;
    uint256 perRequest;
    uint256 refund;
    uint256 total;
}

/// @notice The one cost formula, as protocol/tariff.py has it, to the wei (tests/vectors/price.json is read by both):
/// total = ceil(multiplier * lines / 10^16) + perRequest - refund, rounded once.
library Price {
    uint256 private constant BPS = 10_000;
    uint256 private constant MULTIPLIER_ONE = 1e16;

    uint8 private constant EMBED = 1;
    uint8 private constant BATCH = 2;
    uint8 private constant FLEX = 0;
    uint8 private constant STANDARD = 1;
    uint8 private constant PRIORITY = 2;

    /// @notice What a tier is sold for and what it promises; a promise of 0 ms is none.
    struct Terms {
        uint256 bps;
        uint256 ttftMs;
        uint256 tpotMs;
        uint256 refundBps;
    }

    /// @notice Whether a receipt is what a tariff gives for the counts and times that it states itself, and the tariff
    /// was in force when the job was received.
    function holds(Tariff memory tariff, WorkReceipt memory r) internal pure returns (bool) {
        uint256 received = r.receivedAt / 1000;
        if (received < tariff.validFrom || received >= tariff.validUntil) return false;
        (bool possible, Cost memory due) = costUp(tariff, r);
        if (!possible || r.total != due.total || r.refund != due.refund || r.perRequest != due.perRequest) {
            return false;
        }
        if (r.promptLine != due.promptLine || r.cachedLine != due.cachedLine) return false;
        if (r.completionLine != due.completionLine || r.reasoningLine != due.reasoningLine) return false;
        return r.multiplier == due.multiplier;
    }

    /// @notice What the receipt's counts cost. Not `possible`: such a job cannot be sold under the tariff, its counts
    /// cannot be, or no voucher holds the sum.
    function costUp(Tariff memory tariff, WorkReceipt memory r) internal pure returns (bool possible, Cost memory due) {
        if (!_isSold(tariff, r)) return (false, due);
        Terms memory terms = tierTerms(tariff, r.tier);
        uint256 fresh = r.promptTokens - r.cachedTokens;
        due.promptLine = fresh * (r.kind == EMBED ? tariff.embeddingPrice : tariff.promptPrice);
        due.cachedLine = uint256(r.cachedTokens) * tariff.cachedPrice;
        due.completionLine = uint256(r.completionTokens - r.reasoningTokens) * tariff.completionPrice;
        due.reasoningLine = uint256(r.reasoningTokens) * tariff.reasoningPrice;
        uint256 context = r.promptTokens > tariff.longContextThreshold ? tariff.longContextBps : BPS;
        due.multiplier = terms.bps * context * (r.isPrivate ? tariff.privacyBps : BPS) * r.baseBps;
        uint256 lines = due.promptLine + due.cachedLine + due.completionLine + due.reasoningLine;
        // Prices of 96 bits and bps of 32 can pass a word; what does, passes a voucher's 96 bits by far.
        if (lines != 0 && due.multiplier > (type(uint256).max - MULTIPLIER_ONE) / lines) return (false, due);
        uint256 metered = (due.multiplier * lines + MULTIPLIER_ONE - 1) / MULTIPLIER_ONE;
        if (metered > type(uint192).max) return (false, due);
        due.perRequest = tariff.perRequest;
        due.refund = _isMissed(terms, r) ? metered * terms.refundBps / BPS : 0;
        // A share above one would give back more than was charged: no sheet that a client takes has one.
        if (due.refund > metered + due.perRequest) return (false, due);
        due.total = metered + due.perRequest - due.refund;
        possible = due.total <= type(uint96).max;
    }

    /// @notice A tier's part of the sheet.
    function tierTerms(Tariff memory t, uint8 tier) internal pure returns (Terms memory) {
        if (tier == FLEX) return Terms(t.flexBps, t.flexTtftMs, t.flexTpotMs, t.flexRefundBps);
        if (tier == STANDARD) return Terms(t.standardBps, t.standardTtftMs, t.standardTpotMs, t.standardRefundBps);
        return Terms(t.priorityBps, t.priorityTtftMs, t.priorityTpotMs, t.priorityRefundBps);
    }

    /// @dev Counts that can be, of a kind and tier that are sold, at a base multiplier within bounds or reserved.
    function _isSold(Tariff memory tariff, WorkReceipt memory r) private pure returns (bool) {
        if (r.cachedTokens > r.promptTokens || r.reasoningTokens > r.completionTokens) return false;
        if (r.kind > BATCH || r.tier > PRIORITY || (r.kind == BATCH && r.tier != FLEX)) return false;
        if (r.kind == EMBED && (r.cachedTokens != 0 || r.completionTokens != 0)) return false;
        if (tierTerms(tariff, r.tier).bps == 0) return false;
        if (r.reservation != 0) return uint256(r.baseBps) + tariff.reservedDiscountBps == BPS;
        return r.baseBps >= tariff.baseMinBps && r.baseBps <= tariff.baseMaxBps;
    }

    /// @dev Whether the first token came late or not at all, or at the end the average token was slower than promised.
    function _isMissed(Terms memory terms, WorkReceipt memory r) private pure returns (bool) {
        uint256 until = r.firstTokenAt != 0 ? r.firstTokenAt : r.finishedAt;
        if (until != 0 && terms.ttftMs != 0 && until > r.receivedAt + terms.ttftMs) return true;
        if (r.finishedAt == 0 || terms.tpotMs == 0 || r.completionTokens < 2) return false;
        uint256 due = uint256(r.firstTokenAt) + r.waitedMs + terms.tpotMs * (r.completionTokens - 1);
        return r.finishedAt > due;
    }
}
