/* All interleavings of the two-hop exchange by spin: one choice for each stage's next step and for each
   message. State and steps are those of two_hop_spin.cc; run_spin.sh builds and runs it.
   spin allows no calls in expressions, so what is possible in a state lies in the state: two_hop_can has a
   byte for each action, then error, finished, all rows there. */

c_decl {
#define STATE_BYTES 3720
#define NUM_ACTIONS 34
  extern int two_hop_state_bytes(void);
  extern void two_hop_init(void);
  extern void two_hop_apply(int action);
  unsigned char two_hop_state[STATE_BYTES] __attribute__((aligned(8)));
  unsigned char two_hop_can[NUM_ACTIONS + 3];
}
c_track "two_hop_state" "3720"
c_track "two_hop_can" "37"

#define ACTION(n) :: c_expr { two_hop_can[n] } -> c_code { two_hop_apply(n); }

active proctype exchange() {
  c_code {
    if (two_hop_state_bytes() != STATE_BYTES) Uerror("STATE_BYTES is not the model's");
    two_hop_init();
  };
  do
  :: c_expr { two_hop_can[34] } -> assert(false)
  :: c_expr { two_hop_can[35] } -> break
  ACTION(0)
  ACTION(1)
  ACTION(2)
  ACTION(3)
  ACTION(4)
  ACTION(5)
  ACTION(6)
  ACTION(7)
  ACTION(8)
  ACTION(9)
  ACTION(10)
  ACTION(11)
  ACTION(12)
  ACTION(13)
  ACTION(14)
  ACTION(15)
  ACTION(16)
  ACTION(17)
  ACTION(18)
  ACTION(19)
  ACTION(20)
  ACTION(21)
  ACTION(22)
  ACTION(23)
  ACTION(24)
  ACTION(25)
  ACTION(26)
  ACTION(27)
  ACTION(28)
  ACTION(29)
  ACTION(30)
  ACTION(31)
  ACTION(32)
  ACTION(33)
  od;
  if
  :: c_expr { two_hop_can[36] } -> skip
  :: else -> assert(false)
  fi
}
