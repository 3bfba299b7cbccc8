// Included inside the namespace of one instruction set, after Vec.

// The mapper's last two layers for one row of output pixels. All in fp32: a rounding here could change the expert.
static void route_row(const Route &p, int64_t row) {
    const int64_t *col_index = p.col_index;
    const Vec rel_row = set1(p.row_rel[row]);
    for (int64_t col = 0; col < p.width; ++col) {
        const float *cell = p.table + (p.row_index[row] * p.table_width + col_index[col]) * p.table_stride;
        const Vec rel_col = set1(p.col_rel[col]);
        float best = 0;
        int64_t choice = 0;
        for (int64_t j = 0; j < p.num_experts; ++j) {
            Vec total = zero();
            for (int64_t k = 0; k < p.hidden; k += Vec::kLanes) {
                const Vec hidden = relu(fma(rel_col, load(p.w_rel + p.hidden + k),
                                            fma(rel_row, load(p.w_rel + k), load(cell + k))));
                total = fma(hidden, load(p.w_out + j * p.hidden + k), total);
            }
            const float logit = sum(total) + p.b_out[j];
            if (p.logits) p.logits[(row * p.width + col) * p.num_experts + j] = logit;
            if (j == 0 || logit > best) { best = logit; choice = j; }  // the first of equals, as argmax
        }
        p.expert_map[row * p.map_stride + col] = static_cast<uint8_t>(choice);
    }
}
