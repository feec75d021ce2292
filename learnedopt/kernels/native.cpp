// The compiled kernels as operators of torch.

#include <torch/library.h>

#include "step.h"
#include "training.h"

// What all steps take; beside it, each has what is its rule's.
#define STEP                                                                                                    \
  "Tensor(a!)[] params, Tensor[] grads, bool maximize, Tensor(b!)[] h, Tensor(c!)[] h_scale, Tensor(d!)[] c, " \
  "Tensor(e!)[] c_low, Tensor(j!)[] c_scale, Tensor[] weights, float lr, float weight_decay, "

TORCH_LIBRARY(learnedopt, m) {
  m.def("lstm_forward(Tensor x, Tensor h, Tensor c, Tensor[] weights) -> (Tensor, Tensor)");
  m.def(
      "lstm_backward(Tensor x, Tensor h, Tensor c, Tensor h_out, Tensor[] weights, Tensor? d_top, Tensor? d_h, "
      "Tensor? d_c, bool needs_x) -> (Tensor?, Tensor, Tensor, Tensor[])");
  m.def("lstm_step(" STEP "Tensor readout, Tensor bias, bool preprocess, float p, float output_scale) -> ()");
  m.def("adam_lstm_step(" STEP
        "Tensor(f!)[] fast, Tensor(g!)[] slow, Tensor(i!)[] square, Tensor statistics, Tensor readout, Tensor bias, "
        "float fast_decay, float slow_decay, float square_decay, float eps, float nominal_step, float log_step_gain, "
        "float log_step_bound, float mix_bound) -> ()");
  m.def(
      "adam_lstm_sums(Tensor[] params, Tensor[] grads, bool maximize, Tensor[] fast, Tensor[] slow, Tensor[] square, "
      "Tensor corrections, float fast_decay, float slow_decay, float square_decay, float eps) -> Tensor");
  m.def("schedule_free_lstm_step(" STEP
        "Tensor(f!)[] momentum, Tensor(g!)[] square, Tensor(i!)[] offset, Tensor(k!)[] origin, Tensor statistics, "
        "Tensor readout, float momentum_decay, float square_decay, float eps, float nominal_step, float interpolation, "
        "float log_step_gain, float log_step_bound, float mix_bound, float log_averaging_bound) -> ()");
  m.def(
      "schedule_free_lstm_sums(Tensor[] params, Tensor[] grads, bool maximize, Tensor[] momentum, Tensor[] square, "
      "Tensor[] offset, Tensor[] origin, Tensor corrections, float momentum_decay, float square_decay, float eps, "
      "float largest) -> Tensor");
  m.def("rnnprop_step(" STEP
        "Tensor(f!)[] momentum, Tensor(g!)[] square, Tensor statistics, Tensor inputs, Tensor inputs_bias, "
        "Tensor readout, Tensor bias, float momentum_decay, float square_decay, float eps, float output_scale) -> ()");
  m.def("meta_lstm_step(" STEP
        "Tensor(f!)[] forget_state, Tensor(g!)[] input_state, Tensor statistics, Tensor forget, Tensor forget_bias, "
        "Tensor input, Tensor input_bias, float p, float gradient_divisor, bool feed_back_gate) -> ()");
}

TORCH_LIBRARY_IMPL(learnedopt, CPU, m) {
  m.impl("lstm_forward", learnedopt::lstm_forward);
  m.impl("lstm_backward", learnedopt::lstm_backward);
  m.impl("lstm_step", learnedopt::lstm_step);
  m.impl("adam_lstm_step", learnedopt::adam_lstm_step);
  m.impl("adam_lstm_sums", learnedopt::adam_lstm_sums);
  m.impl("schedule_free_lstm_step", learnedopt::schedule_free_lstm_step);
  m.impl("schedule_free_lstm_sums", learnedopt::schedule_free_lstm_sums);
  m.impl("rnnprop_step", learnedopt::rnnprop_step);
  m.impl("meta_lstm_step", learnedopt::meta_lstm_step);
}
